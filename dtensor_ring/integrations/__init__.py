"""Hugging Face models and trainers; nothing here is imported before it is used."""
