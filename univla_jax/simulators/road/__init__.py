"""The embedded road: seeded scenes, traffic, a front camera, and NAVSIM-shaped logs of them."""
