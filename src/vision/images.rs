//! Images on the host: [`Images`], f32 `[n, channels, height, width]`.

use crate::error::{Result, ensure};

/// Images of one size, channel by channel, row by row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Images {
    shape: [usize; 3],
    pixels: Vec<f32>,
}

/// Images with the classes that they belong to.
#[derive(Clone, Debug, Default)]
pub struct Examples {
    /// The images.
    pub images: Images,
    /// Their classes.
    pub labels: Vec<u32>,
}

impl Examples {
    /// Of an image and a label each.
    ///
    /// # Errors
    /// `Shape` for other numbers of labels than of images.
    pub fn new(images: Images, labels: Vec<u32>) -> Result<Self> {
        ensure!(images.len() == labels.len(), Shape, "{} labels for {} images", labels.len(), images.len());
        Ok(Self { images, labels })
    }

    /// These examples, in this order.
    ///
    /// # Errors
    /// `Shape` for an example that is not there.
    pub fn pick(&self, which: &[usize]) -> Result<Self> {
        let images = self.images.pick(which)?;
        Ok(Self { images, labels: which.iter().map(|&i| self.labels[i]).collect() })
    }
}

/// How images are enlarged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scaling {
    /// Each pixel becomes that of the input which its centre falls into.
    Nearest,
    /// Between the four pixels around, whose centres are at half pixels; constant beyond the outermost.
    Bilinear,
}

impl Images {
    /// Images of `[channels, height, width]`.
    ///
    /// # Errors
    /// `Shape` where `pixels` are not whole images.
    pub fn new(shape: [usize; 3], pixels: Vec<f32>) -> Result<Self> {
        let one: usize = shape.iter().product();
        ensure!(
            one > 0 && pixels.len().is_multiple_of(one),
            Shape,
            "{} values are no images of {shape:?}",
            pixels.len()
        );
        Ok(Self { shape, pixels })
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.pixels.len() / self.values().max(1)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pixels.is_empty()
    }

    /// Channels, height and width of each.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// All values, image by image.
    pub fn pixels(&self) -> &[f32] {
        &self.pixels
    }

    /// Values of one image.
    fn values(&self) -> usize {
        self.shape.iter().product()
    }

    /// These images, in this order; one may come more than once.
    ///
    /// # Errors
    /// `Shape` for an image that is not there.
    pub fn pick(&self, which: &[usize]) -> Result<Self> {
        let (n, one) = (self.len(), self.values());
        let mut pixels = Vec::with_capacity(which.len() * one);
        for &i in which {
            ensure!(i < n, Shape, "image {i} of {n}");
            pixels.extend_from_slice(&self.pixels[i * one..(i + 1) * one]);
        }
        Ok(Self { shape: self.shape, pixels })
    }

    /// Images `first ..` up to `most` of them.
    pub(super) fn part(&self, first: usize, most: usize) -> Self {
        let (n, one) = (self.len(), self.values());
        let pixels = self.pixels[first.min(n) * one..(first + most).min(n) * one].to_vec();
        Self { shape: self.shape, pixels }
    }

    /// (x - mean) / deviation, each for its channel; one of each serves all channels.
    ///
    /// # Errors
    /// `Usage` for other numbers of them, or deviations that are not above 0.
    pub fn normalize(&mut self, mean: &[f32], deviation: &[f32]) -> Result<()> {
        let [channels, h, w] = self.shape;
        for (what, given) in [("means", mean), ("deviations", deviation)] {
            ensure!([1, channels].contains(&given.len()), Usage, "{} {what} for {channels} channels", given.len());
        }
        let good = deviation.iter().all(|&d| d > 0.0 && d.is_finite()) && mean.iter().all(|m| m.is_finite());
        ensure!(good, Usage, "images cannot be normalised by means {mean:?} and deviations {deviation:?}");
        for (i, plane) in self.pixels.chunks_exact_mut(h * w).enumerate() {
            let c = i % channels;
            let (m, d) = (mean[c % mean.len()], deviation[c % deviation.len()]);
            plane.iter_mut().for_each(|x| *x = (*x - m) / d);
        }
        Ok(())
    }

    /// The same in another size.
    ///
    /// # Errors
    /// `Usage` for a height or width of 0.
    pub fn resize(&self, height: usize, width: usize, scaling: Scaling) -> Result<Self> {
        ensure!(height > 0 && width > 0, Usage, "images cannot become {height}x{width}");
        let [channels, h, w] = self.shape;
        let (rows, cols) = (sources(h, height, scaling), sources(w, width, scaling));
        let mut pixels = Vec::with_capacity(self.len() * channels * height * width);
        for plane in self.pixels.chunks_exact(h * w) {
            for &(y, below, v) in &rows {
                for &(x, right, u) in &cols {
                    let at = |y: usize, x: usize| plane[y * w + x];
                    let top = at(y, x) + u * (at(y, right) - at(y, x));
                    let bottom = at(below, x) + u * (at(below, right) - at(below, x));
                    pixels.push(top + v * (bottom - top));
                }
            }
        }
        Ok(Self { shape: [channels, height, width], pixels })
    }

    /// One channel as three.
    ///
    /// # Errors
    /// `Shape` for images of more than one channel.
    pub fn to_rgb(&self) -> Result<Self> {
        let [channels, h, w] = self.shape;
        ensure!(channels == 1, Shape, "images of {channels} channels have colours already");
        let pixels = self.pixels.chunks_exact(h * w).flat_map(|p| [p, p, p]).flatten().copied().collect();
        Ok(Self { shape: [3, h, w], pixels })
    }

    /// The patches of all images, each channel by channel and row by row, patches row by row: what a convolution whose stride is its
    /// size multiplies. Sides are multiples of `patch` (the caller checks).
    pub(super) fn patches(&self, patch: usize) -> Vec<f32> {
        let [channels, h, w] = self.shape;
        let mut out = Vec::with_capacity(self.pixels.len());
        for image in self.pixels.chunks_exact(self.values()) {
            for (top, left) in (0..h / patch).flat_map(|y| (0..w / patch).map(move |x| (y * patch, x * patch))) {
                for (c, y) in (0..channels).flat_map(|c| (0..patch).map(move |y| (c, y))) {
                    out.extend_from_slice(&image[(c * h + top + y) * w + left..][..patch]);
                }
            }
        }
        out
    }
}

/// For each of `to` places the two of `from` that it lies between, and how near it is to the second.
fn sources(from: usize, to: usize, scaling: Scaling) -> Vec<(usize, usize, f32)> {
    let place = |i: usize| (i as f64 + 0.5) * from as f64 / to as f64;
    let each = |i: usize| match scaling {
        Scaling::Nearest => {
            let at = (place(i) as usize).min(from - 1);
            (at, at, 0.0)
        }
        Scaling::Bilinear => {
            let at = (place(i) - 0.5).clamp(0.0, (from - 1) as f64);
            (at as usize, (at as usize + 1).min(from - 1), at.fract() as f32)
        }
    };
    (0..to).map(each).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patches_are_those_of_a_strided_convolution() {
        let image = Images::new([2, 4, 4], (0..32).map(|i| i as f32).collect()).unwrap();
        let want = [0, 1, 4, 5, 16, 17, 20, 21, 2, 3, 6, 7, 18, 19, 22, 23];
        assert_eq!(image.patches(2)[..16], want.map(|i| i as f32));
        assert_eq!(image.patches(2).len(), 32);
    }

    /// torch.nn.functional.interpolate of [[1, 2], [3, 5]] to 3x4, mode "bilinear" with align_corners=False, and "nearest-exact".
    #[test]
    fn sizes_change_as_in_torch() {
        let small = Images::new([1, 2, 2], vec![1.0, 2.0, 3.0, 5.0]).unwrap();
        let big = small.resize(3, 4, Scaling::Bilinear).unwrap();
        let want = [1.0, 1.25, 1.75, 2.0, 2.0, 2.375, 3.125, 3.5, 3.0, 3.5, 4.5, 5.0];
        assert!(big.pixels().iter().zip(want).all(|(x, want)| (x - want).abs() < 1e-6), "{:?}", big.pixels());
        let big = small.resize(3, 4, Scaling::Nearest).unwrap();
        assert_eq!(big.pixels(), [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 5.0, 5.0, 3.0, 3.0, 5.0, 5.0]);
        assert!(small.resize(0, 2, Scaling::Nearest).is_err());
    }

    #[test]
    fn normalising_and_picking() {
        let mut two = Images::new([2, 1, 1], vec![1.0, 2.0, 3.0, 4.0]).unwrap();
        two.normalize(&[1.0, 2.0], &[2.0]).unwrap();
        assert_eq!(two.pixels(), [0.0, 0.0, 1.0, 1.0]);
        assert_eq!(two.pick(&[1, 0, 1]).unwrap().pixels(), [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]);
        assert!(two.pick(&[2]).unwrap_err().to_string().contains("image 2 of 2"));
        assert!(two.normalize(&[1.0; 3], &[1.0]).is_err() && two.normalize(&[1.0], &[0.0]).is_err());
        assert!(Images::new([1, 2, 2], vec![0.0; 5]).is_err() && two.to_rgb().is_err());
    }
}
