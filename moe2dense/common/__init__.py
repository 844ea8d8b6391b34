"""Small tools that know nothing of models: files written whole, processes, progress, units, seeds, versions.

Every other package may use them; they use nothing of this project but its errors.
"""
