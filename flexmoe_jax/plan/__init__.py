"""What a run would take on devices that are not here: by arithmetic from shapes, and by the compiler."""
