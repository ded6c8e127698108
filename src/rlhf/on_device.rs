//! P on the device on which the model runs.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use super::inverse::Inverse;
use super::vector::rows;
use crate::backend::{Buffer, In, Train};
use crate::dtype::{Elem, Float};
use crate::error::{Result, ensure};

/// In what P is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Half the memory and traffic; zᵀPz is right to some 5e-5.
    F32,
    /// Exact for all purposes.
    #[default]
    F64,
}

/// A matrix `[width, width]` on the device `be`.
///
/// # Errors
/// The device's.
pub fn on_device<B: Train>(be: Arc<B>, width: usize, precision: Precision) -> Result<Box<dyn Inverse>> {
    Ok(match precision {
        Precision::F32 => Box::new(OnDevice::<B, f32>::new(be, width)?),
        Precision::F64 => Box::new(OnDevice::<B, f64>::new(be, width)?),
    })
}

/// P in a buffer. Vectors come from the host, where the scalars of a step are computed: on a GPU a step waits once, for u = P z.
struct OnDevice<B: Train, T: Elem> {
    be: Arc<B>,
    width: usize,
    p: B::Buf<T>,
    room: Mutex<Room<B, T>>,
}

/// Room for some rows of what comes and goes.
struct Room<B: Train, T: Elem> {
    x: B::Buf<T>,
    y: B::Buf<T>,
}

impl<B: Train, T: Float> Room<B, T> {
    fn new(be: &B, n: usize) -> Result<Self> {
        Ok(Self { x: be.alloc(n)?, y: be.alloc(n)? })
    }

    /// `values` on the device.
    fn bring(&mut self, be: &B, values: &[f64]) -> Result<()> {
        let n = values.len();
        if self.x.len() < n {
            *self = Self::new(be, n)?;
        }
        let narrow: Vec<T> = values.iter().map(|&x| T::from_f64(x)).collect();
        be.upload(self.x.head_mut(n), &narrow)
    }
}

impl<B: Train, T: Float> OnDevice<B, T> {
    fn new(be: Arc<B>, width: usize) -> Result<Self> {
        let room = Mutex::new(Room::new(&*be, width)?);
        Ok(Self { p: be.alloc(width * width)?, room, width, be })
    }

    fn matrix(&self) -> In<'_, B, T> {
        self.p.head(self.width * self.width)
    }
}

impl<B: Train, T: Float> Inverse for OnDevice<B, T> {
    fn width(&self) -> usize {
        self.width
    }

    fn bytes(&self) -> usize {
        self.width * self.width * size_of::<T>()
    }

    fn times(&self, x: &[f64], y: &mut [f64]) -> Result<()> {
        let n = x.len();
        rows("P", x, self.width)?;
        ensure!(y.len() == n, Shape, "P: {n} values to multiply and room for {}", y.len());
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        room.bring(&self.be, x)?;
        let Room { x, y: out } = &mut *room;
        self.be.mul_rows(out.head_mut(n), self.matrix(), x.head(n), self.width)?;
        let mut wide = vec![T::default(); n];
        self.be.download(out.head(n), &mut wide)?;
        y.iter_mut().zip(wide).for_each(|(y, x)| *y = x.to_f64());
        Ok(())
    }

    fn subtract(&mut self, v: &[f64], scale: f64) -> Result<()> {
        rows("P", v, self.width)?;
        let (n, room) = (self.width * self.width, self.room.get_mut().unwrap_or_else(PoisonError::into_inner));
        room.bring(&self.be, v)?;
        self.be.subtract_outer(self.p.head_mut(n), room.x.head(v.len()), self.width, scale)
    }

    fn read(&self) -> Result<Vec<f64>> {
        let n = self.width * self.width;
        let mut p = vec![T::default(); n];
        self.be.download(self.matrix(), &mut p)?;
        Ok(p.into_iter().map(|x| x.to_f64()).collect())
    }

    fn write(&mut self, p: &[f64]) -> Result<()> {
        let n = self.width * self.width;
        ensure!(p.len() == n, Shape, "P: {} values, expected {n}", p.len());
        let narrow: Vec<T> = p.iter().map(|&x| T::from_f64(x)).collect();
        self.be.upload(self.p.head_mut(n), &narrow)
    }
}
