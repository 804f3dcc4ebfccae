"""The embedded model: Stable Diffusion's architecture at 64 x 64 pixels, its judge, its vision-language model, how they were made."""
