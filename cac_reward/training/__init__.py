"""Training a judge: stages from annotated clips to a judge that says where and when."""
