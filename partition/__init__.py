"""The preprocessing tool: assign a part to every node, write the store, verify it. Imported as dist_egnn.partition."""
