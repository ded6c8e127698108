use super::*;
use crate::backend::naive::normal_cdf;
use crate::rng::Rng;

struct Map<F>(F, Vec<f32>);

trait Function {
    fn call<S: Simd>(&self, s: S, x: S::V) -> S::V;
}

impl<F: Function> Kernel for Map<F> {
    type Out = Vec<f32>;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Vec<f32> {
        let mut y = vec![0.0; self.1.len()];
        for (y, x) in y.chunks_mut(S::N).zip(self.1.chunks(S::N)) {
            s.store_part(self.0.call(s, s.load_part(x, 0.0)), y);
        }
        y
    }
}

macro_rules! function {
    ($name:ident, $s:ident, $x:ident, $e:expr) => {
        struct $name;
        impl Function for $name {
            #[inline(always)]
            fn call<S: Simd>(&self, $s: S, $x: S::V) -> S::V {
                $e
            }
        }
    };
}
function!(Exp, s, x, math::exp(s, x));
function!(Silu, s, x, math::silu(s, x));
function!(Gelu, s, x, math::gelu_tanh(s, x));
function!(ExactGelu, s, x, math::gelu(s, x));
function!(ExactSlope, s, x, math::gelu_slope(s, x));

fn ulps(got: f32, want: f64) -> f64 {
    let w = want as f32;
    let ulp = (f32::from_bits(w.abs().to_bits() + 1) - w.abs()) as f64;
    (got as f64 - want).abs() / ulp
}

#[test]
fn exp_is_close_everywhere() {
    let mut xs: Vec<f32> = (0..400_000).map(|i| -87.3 + i as f32 * (175.6 / 400_000.0)).collect();
    let mut rng = Rng::new(3);
    xs.extend((0..100_000).map(|_| rng.normal() * 1e-3));
    for tier in Tier::available() {
        let ys = dispatch(tier, Map(Exp, xs.clone()));
        let worst = xs.iter().zip(&ys).map(|(&x, &y)| ulps(y, (x as f64).exp())).fold(0.0, f64::max);
        println!("{tier}: {worst:.3} ulp");
        assert!(worst < 2.0, "{tier}: {worst} ulp");
    }
}

#[test]
fn exp_at_the_edges() {
    for tier in Tier::available() {
        let xs = vec![0.0, -0.0, f32::NEG_INFINITY, -87.4, -1e30, f32::INFINITY, 200.0, f32::NAN, -87.336_54];
        let y = dispatch(tier, Map(Exp, xs));
        assert_eq!(&y[..5], &[1.0, 1.0, 0.0, 0.0, 0.0], "{tier}");
        assert!(y[5].is_finite() && y[5] > 2e38 && y[6] == y[5], "{tier}: {y:?}");
        assert!(y[7].is_nan() && y[8] > 0.0, "{tier}: {y:?}");
    }
}

#[test]
fn gates_are_close() {
    let xs: Vec<f32> = (0..100_000).map(|i| -30.0 + i as f32 * 6e-4).chain([-1e4, 1e4, 1e20, -1e20, 0.0]).collect();
    for tier in Tier::available() {
        let (s, g) = (dispatch(tier, Map(Silu, xs.clone())), dispatch(tier, Map(Gelu, xs.clone())));
        for (i, &x) in xs.iter().enumerate() {
            let x = x as f64;
            let silu = x / (1.0 + (-x).exp());
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
            let gelu = x / (1.0 + (-2.0 * u).exp());
            assert!((s[i] as f64 - silu).abs() <= 3e-7 * silu.abs() + 1e-15, "{tier}: silu({x}) = {}", s[i]);
            // The exponent is large where the value is small, so its rounding shows.
            let tol = (3e-7 + 5e-7 * u.abs().min(90.0)) * gelu.abs() + 1e-15;
            assert!((g[i] as f64 - gelu).abs() <= tol, "{tier}: gelu({x}) = {} not {gelu}", g[i]);
        }
    }
}

#[test]
fn gelu_without_tanh_keeps_the_digits_of_its_tail() {
    let xs: Vec<f32> = (0..100_000).map(|i| -12.0 + i as f32 * 2.4e-4).chain([1e30, 0.0]).collect();
    for tier in Tier::available() {
        let (y, slope) = (dispatch(tier, Map(ExactGelu, xs.clone())), dispatch(tier, Map(ExactSlope, xs.clone())));
        for (i, &x) in xs.iter().enumerate() {
            let x = x as f64;
            let (cdf, density) = (normal_cdf(x), (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt());
            // The exponent of the tail is rounded.
            let tol = (6e-7 + if x < 0.0 { 6e-8 * x * x } else { 0.0 }) * (x * cdf).abs();
            assert!((y[i] as f64 - x * cdf).abs() <= tol, "{tier}: gelu({x}) = {} not {}", y[i], x * cdf);
            let want = cdf + if density > 0.0 { x * density } else { 0.0 };
            assert!((slope[i] as f64 - want).abs() <= 4e-7, "{tier}: gelu'({x}) = {} not {want}", slope[i]);
        }
        let edges = dispatch(tier, Map(ExactGelu, vec![f32::NEG_INFINITY, f32::INFINITY, f32::NAN]));
        assert!(edges[0] == 0.0 && edges[1] == f32::INFINITY && edges[2].is_nan(), "{tier}: {edges:?}");
    }
}

/// Loads of all types, stores, arithmetic and the fixed-order sums.
struct Battery<'a>(&'a [f32], &'a [f32]);

impl Kernel for Battery<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (n, a, b) = (S::N, self.0, self.1);
        let get = |v: S::V| {
            let mut o = vec![0.0f32; 16];
            s.store(v, &mut o);
            o.truncate(n);
            o
        };
        let (va, vb) = (s.load(a), s.load(b));
        let each = |f: &dyn Fn(f32, f32) -> f32| -> Vec<f32> { (0..n).map(|i| f(a[i], b[i])).collect() };
        assert_eq!(get(s.add(va, vb)), each(&|a, b| a + b));
        assert_eq!(get(s.sub(va, vb)), each(&|a, b| a - b));
        assert_eq!(get(s.mul(va, vb)), each(&|a, b| a * b));
        assert_eq!(get(s.div(va, vb)), each(&|a, b| a / b));
        assert_eq!(get(s.min(va, vb)), each(&f32::min));
        assert_eq!(get(s.max(va, vb)), each(&f32::max));
        assert_eq!(get(s.zero_below(va, vb, s.splat(0.25))), each(&|a, b| if b < 0.25 { 0.0 } else { a }));
        for (x, y) in get(s.fma(va, vb, va)).into_iter().zip(each(&|a, b| a.mul_add(b, a))) {
            assert!((x - y).abs() <= 2e-7 * (y.abs() + 1.0));
        }
        for (x, y) in get(s.fnma(va, vb, va)).into_iter().zip(each(&|a, b| (-a).mul_add(b, a))) {
            assert!((x - y).abs() <= 2e-7 * (y.abs() + 1.0));
        }
        assert_eq!(get(s.pow2(s.splat(12_582_912.0 - 126.0)))[n - 1], 2f32.powi(-126));
        assert_eq!(get(s.pow2(s.splat(12_582_912.0 + 127.0)))[0], 2f32.powi(127));
        let h: Vec<f16> = a.iter().map(|&x| f16::from_f32(x)).collect();
        let w: Vec<bf16> = a.iter().map(|&x| bf16::from_f32(x)).collect();
        assert_eq!(get(s.load(&h)), h[..n].iter().map(|x| x.to_f32()).collect::<Vec<_>>());
        // SAFETY: sixteen values are there.
        let wide = unsafe { s.load_bf16(w.as_ptr()) };
        assert_eq!(get(wide), w[..n].iter().map(|x| x.to_f32()).collect::<Vec<_>>());
        let mut o = vec![f16::ZERO; 16];
        s.store(va, &mut o);
        assert_eq!(o[..n], h[..n]);
        let mut t = a[..n].to_vec();
        while t.len() > 1 {
            let half = t.len() / 2;
            t = (0..half).map(|i| t[i] + t[i + half]).collect();
        }
        assert_eq!(s.sum(va), t[0]);
        assert_eq!(s.greatest(va), a[..n].iter().copied().fold(f32::MIN, f32::max));
        assert_eq!(get(s.load_part(&a[..3], 7.0))[..4], [a[0], a[1], a[2], 7.0]);
    }
}

#[test]
fn lanes_do_what_they_say() {
    let mut rng = Rng::new(1);
    for _ in 0..200 {
        let a: Vec<f32> = (0..16).map(|_| rng.normal()).collect();
        let b: Vec<f32> = (0..16).map(|_| rng.normal()).collect();
        for tier in Tier::available() {
            dispatch(tier, Battery(&a, &b));
        }
    }
}
