"""`calibrate`: what is learned of the layers from text before they are compressed."""
