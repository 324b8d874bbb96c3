"""What model files are made of; sharding will be a property of these."""
