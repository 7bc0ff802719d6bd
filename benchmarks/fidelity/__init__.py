"""Whether values mean what they say: what is measured by training again, against what was computed in the run."""
