"""Facts about a machine, checks for the usual mistakes, and a test that the processes of a job reach one another."""
