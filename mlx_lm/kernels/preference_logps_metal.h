// Copyright © 2026 MLX Contributors

// What Metal adds to the bodies: how a block of a row is read and written.
// They are macros, since an array of less than 8 elements lies in `constant`
// memory and a larger one in `device` memory.

#define ROW_SHIFT(array, row) 0
#define LOAD_BLOCK(array, type, row, start, size, wanted)

// What lies behind the end of the row has probability 0.
#define READ_BLOCK(values, array, row, start, size)                  \
  if (start + BLOCK <= size) {                                       \
    for (int j = 0; j < BLOCK; j++) {                                \
      values[j] = float(array[row + start + j]);                     \
    }                                                                \
  } else {                                                           \
    for (int j = 0; j < BLOCK; j++) {                                \
      values[j] = (start + j < size) ? float(array[row + start + j]) \
                                     : Limits<float>::min;           \
    }                                                                \
  }

#define WRITE_BLOCK(array, row, start, size, values) \
  for (int j = 0; j < BLOCK; j++) {                  \
    if (start + j < size) {                          \
      array[row + start + j] = T(values[j]);         \
    }                                                \
  }
