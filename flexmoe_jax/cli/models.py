"""`flexmoe merge|optout|replace|inspect|verify`: what a coordinator and an auditor do. Loads no JAX."""
