"""Share runs on the Hugging Face hub, and use the runs of others by their name."""
