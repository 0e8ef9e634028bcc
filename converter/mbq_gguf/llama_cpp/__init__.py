"""The pinned llama.cpp: fetch, patch, build, prove, find, run."""
