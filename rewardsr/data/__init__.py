"""Images, what lies beside them, and how they are degraded."""
