"""The introspection study's parts: training, what is asked, what it says, and the page."""
