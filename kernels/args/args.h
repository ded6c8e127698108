// The contracts of all kernels.
#pragma once
#include "attention.h"
#include "curvature.h"
#include "encoder.h"
#include "matmul.h"
#include "peak.h"
#include "rows.h"
#include "sampling.h"
#include "train.h"
