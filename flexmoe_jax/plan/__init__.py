"""Plans of runs on devices that are not here: estimates from shapes, and the compiler's own figures."""
