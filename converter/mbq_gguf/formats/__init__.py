"""The block formats: bit layout, pack and unpack, and their registration with the gguf package."""
