"""Turn text into blocks of tokens: records of files or data sets, chat templates, packing, labels by domain."""
