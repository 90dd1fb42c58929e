"""CaC as a reward inside other frameworks, one small file for each; none is imported here."""
