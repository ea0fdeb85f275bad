"""Networks: what a network is, our actor-critic, its layers, distributions over actions."""
