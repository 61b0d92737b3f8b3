"""Who computes what: the mesh, the shard of a sequence, and the exchange between ranks."""
