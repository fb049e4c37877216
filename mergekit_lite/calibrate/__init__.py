"""Statistics that methods ask for, gathered while data pass through a model."""
