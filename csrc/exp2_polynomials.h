// Coefficients of 2^f on [0, 1), fitted for least relative error (iteratively reweighted least squares at Chebyshev points).
// EXP2_FAST: degree 3, relative error 7.5e-05. EXP2_FINE: degree 6 with constant term 1, relative error 2.0e-09 before fp32 rounding.
#ifndef ZEN_TURBO_EXP2_POLYNOMIALS_H
#define ZEN_TURBO_EXP2_POLYNOMIALS_H
#define EXP2_FAST_0 0.999925219f
#define EXP2_FAST_1 0.69583354f
#define EXP2_FAST_2 0.226067158f
#define EXP2_FAST_3 0.0780245212f
#define EXP2_FINE_1 0.693147044f
#define EXP2_FINE_2 0.240229306f
#define EXP2_FINE_3 0.0554852806f
#define EXP2_FINE_4 0.00967545157f
#define EXP2_FINE_5 0.00124678464f
#define EXP2_FINE_6 0.00021612915f
#endif

