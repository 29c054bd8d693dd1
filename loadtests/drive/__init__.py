"""Open-loop load: calls come when they come, whether or not the service keeps up."""
