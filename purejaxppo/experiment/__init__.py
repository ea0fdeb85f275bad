"""The host: everything that a person needs around training. The core never imports it."""
