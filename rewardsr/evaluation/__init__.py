"""Running a pipeline on images, scoring it, and showing both."""
