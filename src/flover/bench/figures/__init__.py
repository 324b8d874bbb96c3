"""The figures of the paper: for each a function from a `Bench` to data, and one from data to a picture."""
