"""SkySense V2 in JAX: one backbone for aligned high-resolution, Sentinel-2 and Sentinel-1 imagery.

Dimension key: a letter means the same in every signature, comment and einsum.

    B  samples (global inside jit)        V  views of one shape        T  dates of a modality
    I  images of a sample in one backbone call (views x dates x modalities of one token grid)
    H W  pixel rows (north to south), columns       C  bands in table order
    P Q  token-grid rows, columns         N  tokens (after a merge too)    M  tokens of a window
    J  pairs of views (student, teacher)  U  teacher views
    D  width    F  MLP hidden    A  heads    K  width of a head
    E  experts  k  experts of a token     S  capacity slots    G  routing groups
    Z  prototypes    R  queries    L  classes of the label map    X  text-embedding width

Channels last, time before space: ``B V T H W C``; tokens ``B N D``. A new letter enters here first.
Geometry is in cells: 1 cell = 10 m x 10 m of UTM ground, the Sentinel pixel; (row, column), row 0 in the north.
"""

__version__ = "0.1.0"
