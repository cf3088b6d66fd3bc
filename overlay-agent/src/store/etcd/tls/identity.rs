//! Our own certificate and its key.

use std::path::{Path, PathBuf};

use tokio_rustls::rustls::{
    crypto::CryptoProvider,
    sign::{CertifiedKey, SigningKey},
};
use x509_parser::{
    prelude::{ASN1Time, FromDer as _},
    x509::SubjectPublicKeyInfo,
};

use super::{CERT_FILE, KEY_FILE, certificate, pem, refuse};
use crate::store::StoreError;

/// Our certificate, for messages.
#[derive(Debug)]
pub(super) struct Identity {
    pub(super) file: PathBuf,
    pub(super) not_before: ASN1Time,
    pub(super) not_after: ASN1Time,
}

impl Identity {
    /// Reads the certificate with its chain, and the key that belongs to it.
    pub(super) fn load(
        certificate_file: &Path,
        key_file: &Path,
        provider: &CryptoProvider,
    ) -> Result<(Self, CertifiedKey), StoreError> {
        let chain = pem::certificates(CERT_FILE, certificate_file)?;
        let Some(own) = chain.first().and_then(certificate::parse) else {
            let why =
                format!("cannot read the first certificate in {}: it is damaged", certificate_file.display());
            return refuse(CERT_FILE, why);
        };
        let key = pem::private_key(KEY_FILE, key_file)?;
        let Ok(key) = provider.key_provider.load_private_key(key) else {
            let why = format!(
                "cannot use the private key in {}: it must be RSA (2048 to 8192 bits), ECDSA (P-256, P-384, P-521) or Ed25519",
                key_file.display()
            );
            return refuse(KEY_FILE, why);
        };
        if !belongs(&*key, own.public_key()) {
            let why = format!(
                "the private key in {} does not belong to the certificate in {}: name the files of one pair (in a file \
                 with a chain, the certificate of the key stands first)",
                key_file.display(),
                certificate_file.display()
            );
            return refuse(KEY_FILE, why);
        }
        let validity = own.validity();
        let (not_before, not_after) = (validity.not_before, validity.not_after);
        let identity = Self { file: certificate_file.to_owned(), not_before, not_after };
        Ok((identity, CertifiedKey::new(chain, key)))
    }
}

/// Whether the public half of a key is the one in a certificate.
fn belongs(key: &dyn SigningKey, certified: &SubjectPublicKeyInfo<'_>) -> bool {
    let Some(public) = key.public_key() else { return false };
    SubjectPublicKeyInfo::from_der(public.as_ref())
        .is_ok_and(|(_, public)| public.subject_public_key.data == certified.subject_public_key.data)
}
