"""The bundled toy model: Stable Diffusion's architecture at 64 x 64 pixels.

With it are its judge, its vision-language model, and how they were made.
"""
