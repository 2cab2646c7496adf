"""The paper's method and extensions of it, as pure functions of arrays. Nothing here knows of files or devices."""
