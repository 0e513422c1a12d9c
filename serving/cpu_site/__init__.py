"""A folder for PYTHONPATH: Python runs its sitecustomize.py when it starts."""
