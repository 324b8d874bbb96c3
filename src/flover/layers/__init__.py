"""What model files are made of; sharding is a property of these."""
