"""The table that is the truth: the only package that imports SQLAlchemy and holds SQL."""
