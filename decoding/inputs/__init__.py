"""What users type and hand in: values, decoder specs, names of models, JSON lines; all of it without torch."""
