"""A plug-in whose package is installed without what it needs."""

import not_installed_anywhere  # noqa: F401
