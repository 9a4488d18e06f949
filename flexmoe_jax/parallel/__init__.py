"""Many devices: one mesh, one table of rules for what lies where, and processes that join into one job."""
