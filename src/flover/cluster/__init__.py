"""More than one machine: what a layout would cost before it is bought, and replicas of the server on Ray."""
