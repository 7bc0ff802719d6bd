"""Make memory-mapped token shards from Pile records, and read them."""
