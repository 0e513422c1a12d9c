"""What users type and hand in: values, decoder specs, sources of models, JSON lines. All but ``loading`` without torch."""
