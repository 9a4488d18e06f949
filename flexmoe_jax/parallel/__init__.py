"""Many devices: one mesh, one table of sharding rules, and processes that join into one job."""
