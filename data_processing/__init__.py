"""From Pile records to memory-mapped token shards: the format, the tokenizers, and two commands."""
