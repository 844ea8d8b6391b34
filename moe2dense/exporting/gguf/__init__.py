"""Write a dense student as a GGUF file for llama.cpp."""
