"""Runs on the Hugging Face hub: sharing them, and using those of others by their name."""
