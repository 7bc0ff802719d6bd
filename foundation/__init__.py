"""What every other package stands on; needs nothing but Python."""
