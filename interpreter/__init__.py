"""Object-centric learning for videos: image slots, video slots, masks."""
