"""The reference VLM that ships with the project, and the demonstration on it."""
