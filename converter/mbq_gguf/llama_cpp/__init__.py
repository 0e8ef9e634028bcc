"""The pinned llama.cpp: download, patch, build, verify, find, run."""
