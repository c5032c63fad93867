"""One file a pipeline family; `README.md` beside it says how to write one."""
